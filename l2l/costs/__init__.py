"""What a run will need, told before it: peak memory and time per step, from shapes and a short measurement."""
