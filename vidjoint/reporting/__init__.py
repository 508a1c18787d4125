"""What evaluations found and how it is shown: results, predictions, plots, pages."""
