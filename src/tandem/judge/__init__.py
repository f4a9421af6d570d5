"""Which of two models answers better, by a judge whose own trustworthiness is measured in the same run."""
