"""`make gpu`: tests and benchmarks on a CUDA GPU, side by side with what one would use instead, without a network."""
