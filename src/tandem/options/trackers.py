"""The trackers that transformers has a callback for."""

TRACKERS = {
    "wandb": "wandb", "tensorboard": "", "trackio": "trackio", "mlflow": "mlflow", "comet_ml": "comet_ml",
    "swanlab": "swanlab", "clearml": "clearml", "neptune": "neptune", "azure_ml": "azureml", "codecarbon": "codecarbon",
    "dagshub": "dagshub", "flyte": "flytekit", "dvclive": "dvclive", "kubeflow": "kubeflow",
}  # fmt: skip
"""Name → the package that its callback imports; empty where that is installed with Tandem."""
