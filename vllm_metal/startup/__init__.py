"""What is measured and checked with the loaded model before the first request."""
