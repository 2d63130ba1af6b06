"""What both services stand on: errors, RPC hosting, base-model loading, LoRA bank and layers."""

__version__ = "0.1.0"
