"""Is the plan's memory an upper bound, and a tight one?"""
