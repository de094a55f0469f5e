"""What happened: counters that a run can show and a report can keep.

``tally`` counts in each router · ``counters`` reads all of a model · ``metrics`` figures of a
load · ``tracker`` our figures in Megatron's log.
"""
