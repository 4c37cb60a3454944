"""Where a run's records are shown beside its folder: TensorBoard, Weights & Biases, MLflow."""
