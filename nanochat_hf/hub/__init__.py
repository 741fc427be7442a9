"""What lands on the Hub: models, data sets and their cards."""
