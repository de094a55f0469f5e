"""The routing study: one small GPT, one text, many routers, and what they do to load and loss.

Read in this order: `variants` (what is compared) → `plan` (sizes) → `text` (real tokens) →
`train` (one model by Megatron; with `text` the only file that imports it) → `watch` and `measures`
(what is read from a router) → `workers` (runs shared out to processes) and `kept` (runs on disk) →
`compare` (seeds to estimates) → `findings` (estimates to sentences), `tables`, `picture`.
`command` is the story from end to end.
"""
