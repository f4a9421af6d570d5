"""Run scripts/sft.py or scripts/dpo.py under Ray Train: ray_launch.py RAY OPTIONS… scripts/dpo.py ITS OPTIONS…"""

from tandem.errors import script_main
from tandem.launch.ray import launch

if __name__ == "__main__":
    script_main(launch)
