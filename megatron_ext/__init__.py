"""The engine: weights, data, model, training and evaluation. It never imports prefect, tasks or flows."""
