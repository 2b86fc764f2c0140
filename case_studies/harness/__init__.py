"""What every case study shares: claims, rules, intervals over seeds, resumable work, results as runs."""
