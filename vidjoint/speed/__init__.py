"""What `vidjoint.benchmark` measures."""
