"""Studies: one small GPT, one text, many variants of it, and what they do to load and loss.

Read in this order: `variants` (what a variant is, and the routers) → `plan` (sizes) → `subject`
(what a study is) → `text` (real tokens) → `train` (one model by Megatron; with `text` the only file
that imports it) → `watch` and `measures` (what is read from a router, and from memory) → `workers`
(runs shared out to processes) and `kept` (runs on disk) → `compare` (seeds to estimates) →
`findings` (estimates to sentences), `tables`, `picture`. `command` is the story from end to end;
`routing` and `precisions` are the two studies that it tells.
"""
