"""What a step costs on this machine: beside its two forwards, beside the textbook, in time and in memory."""
