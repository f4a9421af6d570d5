"""The commands: `scripts/dpo.py` is `tandem.commands.dpo`, and so is `tandem dpo`."""
