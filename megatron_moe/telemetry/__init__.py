"""What happened: counters that a run can show and a report can keep."""
