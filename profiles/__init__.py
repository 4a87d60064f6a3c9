"""What fits where: integer arithmetic and tables. Standard library only."""
