"""What one conversion will do, decided before anything is written."""
