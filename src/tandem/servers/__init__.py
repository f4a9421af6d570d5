"""Servers with OpenAI's interface: their addresses, the requests they take, and their replies."""
