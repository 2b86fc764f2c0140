"""What pages measure in jobs: each module checks a form, queues the work, and stores what was found as a run.

torch loads in the job alone.
"""
