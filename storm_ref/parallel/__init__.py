"""Chapter 9: many ranks compute the numbers of the serial run. The chapters before it know nothing of ranks."""
