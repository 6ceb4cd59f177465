"""Operations that several pruners share."""
