"""Names of the files of a round, and of what is in them."""

PROMPTS, SAMPLES, SCORES = "prompts.jsonl", "samples.jsonl", "scores.jsonl"
PAIRS, PAIRS_REPORT = "pairs.jsonl", "pairs_report.json"
SCORES_REPORT = "scores_report.json"
ROUNDS_FILE = "rounds.json"
DATA = "data"  # the label of the data's own answers among those of models
