"""The paper's experiments: what each table holds, the runs behind its rows, the table beside the paper's figures."""
