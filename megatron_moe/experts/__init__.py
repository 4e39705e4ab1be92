"""Choose each expert's neurons from the dense FFN, their scales, and the initial router rows."""
