"""Run scripts/sft.py or scripts/dpo.py under Ray Train: ray_launch.py RAY OPTIONS… scripts/dpo.py ITS OPTIONS…"""

from tandem.commands.ray_launch import main
from tandem.errors import script_main

if __name__ == "__main__":
    script_main(main)
