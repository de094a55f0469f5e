"""The only door to Megatron's model building.

``specs`` put our layer in Megatron's layer specs · ``builder`` makes a whole GPT with it, MTP
layers included · ``arguments`` our flags beside Megatron's · ``patching`` declared replacements of
Megatron functions, for what has no slot.
"""
