"""Ways to ask a judge: one request at a time, or OpenAI's batches."""
