"""Keys and values of what was computed: blocks, prefixes, attention over them."""
