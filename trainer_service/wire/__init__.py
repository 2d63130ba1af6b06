"""Requests and answers: protobuf in, dataclasses out, and back."""
