"""Files that other programs run or read: a function with its parameters, and the formats of other libraries."""
