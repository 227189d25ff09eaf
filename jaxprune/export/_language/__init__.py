"""Language models of the type of Llama in the files and trees of other libraries."""
