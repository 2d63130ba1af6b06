"""The trainer: a gRPC front and a torch engine in two processes."""
