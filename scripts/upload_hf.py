"""Push a trained model to the Hugging Face Hub, with a model card that carries its numbers."""

from tandem.commands.upload_hf import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
