"""What a run leaves behind: its directory, metrics, summary, tables and pictures."""
