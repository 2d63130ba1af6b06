"""What goes into the checkpoint store and comes out of it."""
