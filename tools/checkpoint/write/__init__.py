"""From plan to published files: workers, journal, atomic publication."""
