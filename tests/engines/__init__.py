"""Small real engines, run as processes of their own."""
