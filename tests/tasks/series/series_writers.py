"""Small files of series for the tests of reading and of tasks."""

from pathlib import Path

HEADER = ["@problemName own", "@timeStamps false", "@univariate false", "@equalLength false", "@classLabel true a b"]
ROWS = ["1,2,3:4,5,6:a", "1,2:3,4:b", "0,1:1,0:a", "5,6:7,9:b"]


def write_ts(path: Path, rows: list[str] = ROWS, header: list[str] = HEADER) -> Path:
    path.write_text("\n".join([*header, "@data", *rows]) + "\n", encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[str], header: str = "series,time,label,x,y") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path
