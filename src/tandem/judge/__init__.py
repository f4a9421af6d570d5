"""Which of two models answers better, by the verdicts of a judge whose trustworthiness is measured in the same run."""
