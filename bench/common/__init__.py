"""What measurements share: processes, machine, results, statistics."""
