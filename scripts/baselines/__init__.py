"""What people would run instead of sparse_comm, each as its authors or torch have it."""
