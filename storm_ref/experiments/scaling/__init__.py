"""`make scaling`: strong scaling as a cost model predicts it, beside the paper's figure."""
