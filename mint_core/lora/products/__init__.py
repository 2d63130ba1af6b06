"""Products of matrices on a CPU, by whichever library and layout is fastest there."""
