"""The demo and the benchmarks: real servers, real mounts, figures with the machine that they were measured on."""
