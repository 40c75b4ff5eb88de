"""The saved, deployable thing: predictors, their preprocessing, and the folder they live in."""
