"""`make gpu`: tests and benchmarks on a CUDA GPU, compared with the alternatives in torch and other libraries; runs
offline."""
