"""Servers with OpenAI's interface: where they are, what they are asked, and what they answer."""
