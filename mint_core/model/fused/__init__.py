"""What stands between a layer's matrix products, in one launch each, forward and backward."""
