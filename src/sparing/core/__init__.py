"""The floor everything stands on: jobs, tasks, steps, the store, training, predictors, the meter and the ledger."""
