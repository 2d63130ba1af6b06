"""LoRA adapters: what one is, the bank that holds many, the layers that apply them."""
